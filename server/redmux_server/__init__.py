"""The redmux server: one resident base model, many RED adapters."""
