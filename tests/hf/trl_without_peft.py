"""A run of TRL's trainer where PEFT cannot be imported: `python trl_without_peft.py <folder>`, see test_hf_trl.py."""

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path


class WithoutPeft(PathFinder):
    """What finds installed modules, but for PEFT."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)


def main(folder: Path) -> None:
    import transformers
    import trl
    from datasets import Dataset

    import peft_fx

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft_fx.PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    given = json.loads((folder / "given.json").read_text())
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder / "run"), gradient_checkpointing=False, **given["options"]),
        train_dataset=Dataset.from_list(given["rows"]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps({"losses": losses, "peft": "peft" in sys.modules}))


if __name__ == "__main__":
    sys.meta_path[:] = [WithoutPeft if finder is PathFinder else finder for finder in sys.meta_path]
    main(Path(sys.argv[1]))
