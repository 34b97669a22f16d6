"""Commands that show something for as long as it goes on."""
