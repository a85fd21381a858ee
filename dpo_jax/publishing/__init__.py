"""What goes to the hub: branches, files, cards, and the pushing itself."""
