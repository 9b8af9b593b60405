"""What a run takes: parameters, memory, time and money, and the choice of an offer. Pure and free of torch."""
