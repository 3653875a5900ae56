"""Operations ready to be timed: of a layer, whole layers, collectives, and some of them side by side."""
