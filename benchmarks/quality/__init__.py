"""The laboratory of personalization quality: methods, tasks and users on one frozen model, and the report on them."""
