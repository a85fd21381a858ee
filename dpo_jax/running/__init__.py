"""What a training run is put together from, held to and stopped by."""
