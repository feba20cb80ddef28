"""What users call, one file per verb; `peft_fx` re-exports the functions."""
