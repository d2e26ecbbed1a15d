"""Ranks as processes: how they meet, what each is doing, and what is said when one of them is missing."""
