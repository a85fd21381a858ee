"""Weights in files: Hugging Face's and PEFT's names and layouts."""
