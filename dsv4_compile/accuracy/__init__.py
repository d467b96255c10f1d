"""Is it right, and if not, which rewrite is guilty: verify, shadow, bisect."""
