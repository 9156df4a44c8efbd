"""Everything that runs the base model; torch lives here."""
