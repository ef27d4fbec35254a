from audit_models import fresh, retrained, sets, target, text_records, tokenizer
from inside_models import inside, inside_evidence, losses, small_world

__all__ = [
    "fresh",
    "inside",
    "inside_evidence",
    "losses",
    "retrained",
    "sets",
    "small_world",
    "target",
    "text_records",
    "tokenizer",
]
