"""What a guard must keep: the targets that it hides, and the evidence that it hid them.

The targets stand encrypted in a database (:mod:`expunge.ledger.registry`), what happened to each request in a log that cannot be
changed unseen (:mod:`expunge.ledger.log`), and an auditor checks both without trusting who runs the server
(:mod:`expunge.ledger.verify`). Nothing here speaks HTTP.
"""
