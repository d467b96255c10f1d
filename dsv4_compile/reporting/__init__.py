"""What the compiler says it did: sites found and missed, who runs each op, what it costs; kept for warm starts."""
