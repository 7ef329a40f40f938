"""What a store has to live with: `facts` looks at it, `judgement` says what to do about it."""
