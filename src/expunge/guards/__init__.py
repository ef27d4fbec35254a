"""Guards: forgetting at inference time. A guard is a detector and an action on five hook points; no weight changes.

What a guard hides is still in the weights: at best it is suppressed, never forgotten.
"""
