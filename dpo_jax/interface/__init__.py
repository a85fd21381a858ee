"""What people see and write: flags, settings, the console, errors."""
