"""How ext_proc messages come and go. A transport moves bytes; `session` does the rest, the same for all of them."""
