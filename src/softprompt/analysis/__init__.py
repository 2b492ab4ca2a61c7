"""What finished runs say: reports and rank analysis."""
