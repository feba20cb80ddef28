"""What PEFT 0.21.2 has per method, on float weights: read from its dispatch code and run on the CPU.

    METHODS   name -> (layer types, merge, unmerge, several active adapters); the types are PEFT's layer classes
    NOTES     name -> what does not work there, or only in part

merge: yes, no. unmerge: subtract (recomputes the delta), inverse (of a matrix), divide, exact (kept tensors), no.
active: sum, composed, one, broken: what several active adapters do.
"""

TABLE = """
    LORA              Linear Conv1D Conv1d Conv2d Conv3d Embedding MultiheadAttention Parameter | yes | subtract | sum
    DORA              Linear Conv1D Conv1d Conv2d Conv3d Embedding  | yes | divide   | composed
    ADALORA           Linear Conv1D Conv2d                          | yes | subtract | one trainable
    ADAMSS            Linear                                        | yes | subtract | sum
    BEFT              Linear                                        | yes | subtract | sum
    BOFT              Linear Conv2d                                 | yes | inverse  | composed
    C3A               Linear                                        | yes | subtract | broken
    DEFT              Linear Conv1D                                 | yes | subtract | sum
    DELORA            Linear                                        | yes | subtract | sum
    FOURIERFT         Linear Conv1D                                 | yes | subtract | sum
    FROD              Linear Conv1D                                 | yes | exact    | sum
    GLORA             Linear                                        | yes | divide   | sum
    GRALORA           Linear Conv1D                                 | yes | subtract | sum
    HIRA              Linear Conv1D Conv1d Conv2d Conv3d Embedding  | yes | exact    | sum
    HRA               Linear Conv2d                                 | yes | inverse  | composed
    IA3               Linear Conv1D Conv2d Conv3d                   | yes | divide   | product
    LILY              Linear                                        | no  | no       | sum
    LN_TUNING         any                                           | yes | exact    | one
    LOHA              Linear Conv1d Conv2d                          | yes | subtract | sum
    LOKR              Linear Conv1d Conv2d                          | yes | subtract | sum
    MISS              Linear                                        | yes | subtract | sum
    OFT               Linear Conv2d Embedding                       | yes | inverse  | composed
    OSF               Linear                                        | yes | no       | first only
    PEANUT            Linear                                        | yes | exact    | sum
    POLY              Linear                                        | no  | no       | sum
    PSOFT             Linear                                        | yes | subtract | sum
    PVERA             Linear Conv1D                                 | yes | subtract | sum
    RANDLORA          Linear Conv1D                                 | yes | subtract | sum
    ROAD              Linear                                        | yes | inverse  | composed
    SHADOW            blocks                                        | no  | no       | one
    SHIRA             Linear                                        | yes | subtract | sum
    SUPERTUNING       Linear                                        | yes | subtract | sum
    TINYLORA          Linear Conv1D Embedding                       | yes | subtract | sum
    TRAINABLE_TOKENS  Embedding                                     | yes | exact    | disjoint
    UNILORA           Linear Conv1D                                 | yes | subtract | sum
    VBLORA            Linear Conv1D                                 | yes | subtract | sum
    VERA              Linear Conv1D                                 | yes | subtract | sum
    WAVEFT            Linear Conv1D                                 | yes | subtract | sum
    XLORA             Linear Conv2d Embedding                       | no  | no       | gated
"""
METHODS = {
    name: (tuple(types.split()), merge, unmerge, active)
    for name, types, merge, unmerge, active in (
        (line.split(maxsplit=1)[0], *(part.strip() for part in line.split(maxsplit=1)[1].split("|")))
        for line in TABLE.strip().splitlines()
    )
}
NOTES = {
    "LORA": "dilated convolutions crash, grouped ones do not merge, out_proj of MultiheadAttention gets its update twice",
    "DORA": "grouped and dilated convolutions crash",
    "ADALORA": "Conv2d with groups crashes in the forward",
    "BEFT": "merges only into layers that have a bias",
    "BOFT": "Conv2d: square kernels, no groups, no dilation",
    "C3A": "two active adapters give a wrong forward",
    "HIRA": "convolutions without groups only",
    "HRA": "Conv2d: square kernels, no groups, no dilation",
    "IA3": "unmerge is approximate",
    "OFT": "Conv2d: the forward is wrong for kernels larger than 1",
    "OSF": "merging twice adds twice; unmerge is not implemented",
}
