"""What a model can do, found by trying it once; each probe with the tolerance that it judges by.

Families differ in how they take masks and positions, and lists of names age. So a small probe is run in each way and
compared with the plain way, one sequence at a time; the first way that agrees is kept for that model
(:mod:`.findings`) until something changes that it depends on.
"""
