"""What is counted while a step runs: live bytes, work, a timeline."""
