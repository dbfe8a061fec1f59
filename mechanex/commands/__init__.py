"""What the commands of ``mechanex.cli`` do; nothing here is imported before its command runs."""
