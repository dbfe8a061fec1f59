"""What is kept: the database, accounts' vectors and behaviors, the operator's; imports no other room."""
