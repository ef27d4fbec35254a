"""The named data sets that come with Expunge."""
