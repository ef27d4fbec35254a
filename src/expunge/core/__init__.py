"""Plain types and services that everything else stands on; needs neither transformers nor a network."""
