"""What steering does and what it costs: doses tried, priced, calibrated and chosen."""
