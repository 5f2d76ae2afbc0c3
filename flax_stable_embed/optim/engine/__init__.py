"""What every 8-bit optimizer runs on."""
