"""What a plan is made of: programs compiled ahead, their cost as read."""
