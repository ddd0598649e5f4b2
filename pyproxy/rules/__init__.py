"""What each mode should contain for a plan, as values: no I/O."""
