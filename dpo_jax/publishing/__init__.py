"""What goes to the hub beside the model: its card."""
