"""From files to batches: the loader, video, transforms, downloads and archives, worker processes."""
