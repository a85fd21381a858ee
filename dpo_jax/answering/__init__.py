"""Answers of policies to prompts: what is asked, and the files of answers."""
