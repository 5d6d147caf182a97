"""What an exported model is worth: pictures for the benchmarks of the field, scenes with exact answers, one report."""
