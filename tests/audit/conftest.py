from audit_models import fresh, retrained, sets, target, text_records, tokenizer

__all__ = ["fresh", "retrained", "sets", "target", "text_records", "tokenizer"]
