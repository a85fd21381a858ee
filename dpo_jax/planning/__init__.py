"""What a plan is made of: programs compiled ahead, and a lower bound."""
