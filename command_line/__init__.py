"""What the scripts and commands share: options, the loop over the photos, and the files of a result."""
