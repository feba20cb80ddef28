"""PEFT's names and arguments over the verbs: a script of PEFT's moves by changing its import. No second implementation."""
