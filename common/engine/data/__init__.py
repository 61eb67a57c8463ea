"""From files to batches: the loader, video, transforms, downloads, worker processes."""
