"""What clients speak, as pure translations: bodies in, bodies and error objects out."""
