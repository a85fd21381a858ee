"""What a report is made of: its material, sections, figures and page."""
