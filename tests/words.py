"""Models, a tokenizer and sentences of two dozen words: enough for scripts that begin with files and end with text."""

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [
    *["the", "a", "red", "blue", "old", "new", "cat", "dog", "house", "was", "is", "feels", "good", "bad", "fine"],
    *["text", "label", "positive", "negative", "neutral", ":"],
]
LABELS = {"good": "positive", "bad": "negative", "fine": "neutral"}


def tokenizer(template):
    """One token per word."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                      unk_token="<unk>", model_input_names=["input_ids", "attention_mask"])  # fmt: skip


def llama():
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=len(SPECIAL + WORDS), **ids)), "<s> $A"


def mt5():
    config = hf.MT5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=len(SPECIAL + WORDS),
                          pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    return hf.MT5ForConditionalGeneration(config), "$A </s>"


def roberta():
    config = hf.RobertaConfig(**SMALL, vocab_size=len(SPECIAL + WORDS), max_position_embeddings=24, type_vocab_size=1,
                              pad_token_id=0, num_labels=3)  # fmt: skip
    return hf.RobertaForSequenceClassification(config), "<s> $A </s>"


def sentences(count, draw):
    pick = lambda words: draw.choice(words.split())  # noqa: E731
    for _ in range(count):
        verdict = pick("good bad fine")
        yield {"sentence": f"{pick('the a')} {pick('red blue old new')} {pick('cat dog house')} {pick('was is feels')} {verdict}",
               "label": LABELS[verdict]}  # fmt: skip
