"""What requests look like, field by field."""
