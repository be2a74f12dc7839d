"""What an operator can see from outside: metrics, traces and a live view. Never prompts, texts, soft prompts or who asked."""
