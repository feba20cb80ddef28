"""Passes: GraphModule -> GraphModule, one file, one job. Imported as `peft_fx.passes`."""
