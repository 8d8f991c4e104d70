"""`headwater eval`: models measured on problems, and what tells them apart."""
