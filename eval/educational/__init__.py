"""Our educational benchmark: school knowledge in cloze form, with controls of what the options give away."""
