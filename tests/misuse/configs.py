"""Configs that cannot be meant, and targets that the model has not: refused as PEFT does, and the text says what to do."""

import transformers

from misuse import NONE, bare, config, get, of, of_parts, of_tied

METHODS = [
    "Adamss", "BOFT", "C3A", "Deft", "Delora", "FourierFT", "Frod", "Glora", "Gralora", "HRA", "Hira", "Lily", "LoHa", "LoKr",
    "Miss", "OFT", "Peanut", "Psoft", "Pvera", "RandLora", "Road", "Shira", "VBLoRA", "Vera", "WaveFT",
]  # fmt: skip


def mamba(lib):
    options = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4, time_step_rank=2)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()


REFUSED = {
    # targets
    "typo": (NONE, get(target_modules=["qq"]), "'qq' matches nothing; nearest: q"),
    "regex that matches nothing": (NONE, get(target_modules=".*qq"), "'.*qq' matches nothing"),
    "empty list": (NONE, get(target_modules=[]), "nothing to adapt: target_modules=set()"),
    "no default": (NONE, get(target_modules=None), "name target_modules or target_parameters"),
    "misspelt shorthand": (NONE, get(target_modules="all_linear"), "'all_linear' matches nothing"),
    "all excluded": (NONE, get(exclude_modules=["q", "v"]), "is excluded, by exclude_modules or modules_to_save: layers.0.q"),
    "all to save": (NONE, get(target_modules=["q"], modules_to_save=["q"]), "is excluded"),
    "no such layer": (NONE, get(layers_to_transform=[7]), "layers_to_transform=[7]"),
    "no such list of layers": (NONE, get(layers_to_transform=[0], layers_pattern="nope"), "layers_pattern=nope"),
    "activation": (NONE, get(target_modules=["act"]), "act: Tanh is no class whose weights are known. supported: Conv1D, Linear"),
    "own class": (NONE, get(target_modules=["odd"]), "any parameter by target_parameters"),
    "norm": (NONE, get(target_modules=["norm"]), "layers.{0..1}.norm.weight: LoRA has no form on a 1-d weight; name it in modules_to_save"),
    "list of modules": (NONE, get(target_modules=["layers"]), "layers: ModuleList is no class"),
    "saved list of modules": (NONE, get(target_modules=["head"], modules_to_save=["layers"]), "ModuleList has no forward"),
    "no such parameter": (NONE, get(target_modules=None, target_parameters=["nope"]), "'nope' matches nothing"),
    "parameter of one dimension": (NONE, get(target_modules=[], target_parameters=["odd.w"]), "takes 2-D and 3-D parameters"),
    "parameter of a target": (NONE, get(target_parameters=["q.weight"]), "set target_modules=[] to avoid it"),
    "tokens of no module": (NONE, get(trainable_token_indices={"nope": [1]}), "trainable_token_indices: 'nope' matches nothing"),
    "tokens and saved": (NONE, get(trainable_token_indices={"embed": [1]}, modules_to_save=["embed"]), "choose one"),
    "mamba's fused kernels": (
        mamba, lambda lib, m, t: lib.get_peft_model(m, config(lib, target_modules=["out_proj"])), "leave it out of the targets",
    ),
    "groups": (NONE, of_parts(r=3, target_modules=["conv"]), "r=3 is not divisible by groups=2; nearest valid: 2"),
    "attention of three widths": (NONE, of_parts(target_modules=["cross"]), "keeps separate q, k and v weights; name them in"),
    "lora_bias on an embedding": (NONE, of_parts(target_modules=["embed"], lora_bias=True), "no meaning on kind embedding"),
    "BOFT on an embedding": (NONE, of_parts("BOFT", target_modules=["embed"]), "those of an embedding are token ids"),
    **{
        f"{kind} on an activation": (NONE, of(kind, target_modules=["act"]), "Tanh is no class whose weights are known")
        for kind in METHODS
    },
    "tied tokens": (
        NONE, of_tied(ensure_weight_tying=True, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
        "needs the same trainable_token_indices for all tied modules",
    ),
    # LoRA's config
    "r=0": (NONE, get(r=0), "r: expected an integer from 1 to 65536, got 0"),
    "r=-1": (NONE, get(r=-1), "r: expected an integer from 1"),
    "r='8'": (NONE, get(r="8"), "r: expected int, got '8'"),
    "r=2.5": (NONE, get(r=2.5), "r: expected int, got 2.5"),
    "lora_alpha='a'": (NONE, get(lora_alpha="a"), "lora_alpha: expected float, got 'a'"),
    "lora_dropout=1.5": (NONE, get(lora_dropout=1.5), "lora_dropout: expected 0 <= p < 1, got 1.5"),
    "rank_pattern": (NONE, get(rank_pattern={"q": 0}), "rank_pattern['q']: expected an integer from 1"),
    "bias": (NONE, get(bias="nope"), "bias='nope': expected 'none', 'all'"),
    "init_lora_weights": (NONE, get(init_lora_weights="nope"), "expected one of (True, False, 'gaussian', 'orthogonal')"),
    "DoRA with lora_bias": (NONE, get(use_dora=True, lora_bias=True), "set one of lora_bias and use_dora to False"),
    "regex and layers": (NONE, get(target_modules=".*q", layers_to_transform=[0]), "put the layer numbers into the regex"),
    "regex and list of layers": (NONE, get(target_modules=".*q", layers_pattern="layers"), "put the layer numbers into"),
    "list of layers alone": (NONE, get(layers_pattern="layers"), "name the layer indices too"),
    "target_parameters: a string": (NONE, get(target_parameters="nope"), "target_parameters: expected a list of names"),
    "target_modules: a number": (NONE, get(target_modules=3), "target_modules: expected a list of names or a string, got 3"),
    "exclude_modules: a number": (NONE, get(exclude_modules=3), "exclude_modules: expected a list of names or a string"),
    "task_type": (NONE, get(task_type="NOPE"), "task_type='NOPE': expected one of SEQ_CLS"),
    "unknown field": (NONE, get(nope=1), "unexpected keyword argument 'nope'"),
    "peft_type": (NONE, lambda lib, m, t: lib.get_peft_config({"peft_type": "NOPE"}), "this version has: ADALORA"),
    "no peft_type": (NONE, lambda lib, m, t: lib.get_peft_config({"r": 4}), "names its peft_type, e.g. 'LORA'"),
    # other methods' configs
    "IA3: feedforward_modules": (NONE, of("IA3", feedforward_modules=["head"]), "['head'] are not in target_modules {'q', 'v'}"),
    "LoHa: r": (NONE, of("LoHa", r=0), "r: expected an integer from 1"),
    "LoHa: list of layers": (NONE, of("LoHa", layers_pattern="layers"), "name the layer indices too"),
    "LoKr: r": (NONE, of("LoKr", r=0), "r: expected an integer from 1"),
    "OFT: no size": (NONE, of("OFT", r=0, oft_block_size=0), "(r, oft_block_size)=(0, 0): one has to be positive, the other 0"),
    "OFT: two sizes": (NONE, of("OFT", r=4, oft_block_size=4), "one has to be positive, the other 0"),
    "BOFT: no size": (NONE, of("BOFT", boft_block_size=0), "one has to be positive, the other 0"),
    "BOFT: two sizes": (NONE, of("BOFT", boft_block_size=4, boft_block_num=4), "one has to be positive, the other 0"),
    "BOFT: no divisor": (NONE, of("BOFT", boft_block_size=3), "boft_block_size=3 does not divide 8 input features; nearest valid: 2"),
    "AdaLoRA: no steps": (NONE, of("AdaLora"), "total_step=None: AdaLoRA's schedule needs the number of training steps"),
    "AdaLoRA: schedule": (NONE, of("AdaLora", total_step=10, tinit=8, tfinal=8), "leave no step to reduce the rank in"),
    "AdaLoRA: orth_reg_weight": (NONE, of("AdaLora", total_step=9, orth_reg_weight=-1), "orth_reg_weight: expected 0 or more"),
    "AdaLoRA: DoRA": (NONE, of("AdaLora", total_step=9, use_dora=True), "AdaLoRA makes no use of it"),
    "FourierFT: n_frequency": (NONE, of("FourierFT", n_frequency=0), "n_frequency"),
    "FourierFT: more than there are": (NONE, of("FourierFT", n_frequency=99), "more than the weight's 64 elements; nearest valid: 64"),
    "VBLoRA: vector_length": (NONE, of("VBLoRA", vector_length=3, num_vectors=8), "vector_length"),
    "SHiRA: r": (NONE, of("Shira", r=100), "r=100"),
    "C3A: block_size": (NONE, of("C3A", block_size=3), "block_size"),
    "MiSS: init_weights": (NONE, of("Miss", r=3, init_weights="bat"), "r=3"),
    "RoAd: variant": (NONE, of("Road", variant="x"), "variant='x': expected one of"),
    "RoAd: group_size": (NONE, of("Road", group_size=3), "group_size"),
    "DeLoRA: r": (NONE, of("Delora", r=0), "r: expected an integer from 1"),
    "GraLoRA: gralora_k": (NONE, of("Gralora", r=5, gralora_k=2), "gralora_k"),
    "WaveFT: wavelet_family": (NONE, of("WaveFT", wavelet_family="nope"), "wavelet_family='nope'"),
    "HRA: r": (NONE, of("HRA", r=0), "r: expected an integer from 1"),
}  # fmt: skip

STUMBLES = {
    "no config": (NONE, lambda lib, m, t: lib.get_peft_model(bare(), None), "expected a config, a recipe, a dict or a path"),
    "no regex": (NONE, get(target_modules="(q"), "is no regular expression"),
    "list of initialisers": (NONE, get(init_lora_weights=[1]), "expected one of"),
    "layers: a string": (NONE, get(layers_to_transform="a"), "expected layer indices, got 'a'"),
    "VeRA: r": (NONE, of("Vera", r=0), "r: expected an integer from 1"),
    "RandLoRA: r": (NONE, of("RandLora", r=0), "r: expected an integer from 1"),
    "a token outside the vocabulary": (NONE, get(trainable_token_indices={"embed": [99]}), "[99] lie outside its 11 tokens; resize"),
}  # fmt: skip

STRICTER = {
    "target_modules: a dict": (NONE, get(target_modules={"q": 1}), "expected a list of names or a string"),
    "modules_to_save: a string": (NONE, get(modules_to_save="head"), "modules_to_save: expected a list of names, got 'head'"),
    "dropout of everything": (NONE, get(lora_dropout=1.0), "expected 0 <= p < 1, got 1.0"),
    "negative dropout": (NONE, get(lora_dropout=-0.1), "expected 0 <= p < 1, got -0.1"),
    "module_dropout": (NONE, of("OFT", oft_block_size=4, module_dropout=2.0), "module_dropout: expected 0 <= p < 1"),
    "VBLoRA: topk": (NONE, of("VBLoRA", vector_length=4, num_vectors=1, topk=2), "topk=2 is more than num_vectors=1"),
    "AdaLoRA: init_r": (NONE, of("AdaLora", total_step=9, init_r=0), "init_r: expected an integer from 1"),
}  # fmt: skip
