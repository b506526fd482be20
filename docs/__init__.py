"""What is written about the system, and the scripts that write the parts of it that follow from the code."""
