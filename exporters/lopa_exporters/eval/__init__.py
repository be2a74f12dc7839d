"""The paper's own tasks: MBPP, CruxEval and GLUE, on any Hugging Face model (`lopa eval`)."""
