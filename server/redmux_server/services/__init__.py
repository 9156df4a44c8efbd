"""What the doors share: generation, scoring, reading and validation, without any protocol."""
