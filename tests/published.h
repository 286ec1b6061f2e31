/* Published values of the released Gemma 2 models, as check_model.c wants them.
 * Sources: transformers' tests/models/gemma2/test_modeling_gemma2.py (greedy texts of the
 * base models), gemma.cpp's evals/gemma_test.cc (entropies and answers of the
 * instruction-tuned ones). */

/* Bits a byte of a text; bytes, ids without BOS; values of 2B, 9B and 27B. */
typedef struct {
    const char *name;
    float value[3];
    int n_ids;
    const int32_t *ids;
    const char *text;
} published_entropy;

/* Greedy continuation of a prompt: "repeated", that many times, and "end".  The runs were
 * in bf16 or fp16, so a published token may trail our best one by a rounding of logits:
 * "margin" is how far. */
typedef struct {
    int size; /* 0: 2B, 1: 9B */
    const char *origin;
    float margin;
    int repeat;
    const char *repeated, *end;
    int n_prompt, n_ids; /* n_prompt counts BOS */
    const int32_t *ids;
    const char *text;
} published_greedy;

/* A question in the chat template and words of which one must be in the answer. */
typedef struct {
    const char *first, *question, *words[2];
} published_answer;

static const int32_t SMALL[] = {
    651, 6037, 576, 42680, 603, 48015, 948, 603, 7023, 575, 4238, 235265};
static const int32_t JINGLEBELLS[] = {
    108, 48480, 574, 1593, 573, 8529, 108, 886, 476, 974, 235290, 38689, 2174, 155702,
    108, 235302, 235303, 475, 573, 7969, 783, 871, 108, 169206, 832, 573, 1703, 108,
    235305, 9748, 611, 23191, 2536, 7408, 108, 31119, 27274, 8660, 108, 1841, 2245, 665,
    603, 577, 11316, 578, 2800, 108, 235280, 155702, 574, 5169, 18887, 108};
static const int32_t GETTYSBURG[] = {
    18405, 7716, 578, 6861, 1658, 3958, 1167, 39935, 6293, 11128, 235269, 3054, 736,
    31014, 235269, 476, 888, 7165, 235269, 44868, 575, 35338, 235269, 578, 14613, 577,
    573, 30673, 674, 832, 1359, 708, 5483, 6871, 235265, 109, 5375, 783, 708, 15504,
    575, 476, 1775, 11180, 2036, 235269, 8603, 4270, 674, 7165, 235269, 689, 1089, 7165,
    235269, 712, 44868, 235269, 578, 712, 14613, 235269, 798, 1497, 46690, 235265, 1448,
    708, 2211, 1517, 611, 476, 1775, 64182, 576, 674, 2036, 235265, 1448, 791, 2063,
    577, 91372, 476, 11287, 576, 665, 685, 476, 2048, 34626, 2040, 604, 1941, 1064,
    1517, 5645, 1024, 6672, 674, 674, 7165, 2613, 3685, 235265, 1165, 603, 29911, 24557,
    578, 3591, 674, 783, 1412, 749, 736, 235265, 109, 1860, 575, 476, 8107, 5229, 783,
    798, 780, 91372, 3297, 783, 798, 780, 63671, 5423, 3297, 783, 798, 780, 2717, 1319,
    736, 4216, 235265, 714, 27949, 1359, 235269, 5027, 578, 5455, 235269, 1064, 42189,
    235269, 1517, 235269, 791, 120183, 665, 2166, 3131, 1167, 6528, 2384, 577, 1843,
    689, 196610, 235265, 714, 2134, 877, 2356, 4670, 235269, 4641, 1497, 5434, 235269,
    1212, 783, 1931, 1517, 235269, 901, 798, 2447, 9535, 1212, 984, 1498, 1517, 235265,
    1165, 603, 604, 917, 235269, 573, 5027, 235269, 4644, 577, 614, 14613, 1517, 577,
    573, 78879, 1160, 948, 984, 791, 235269, 6319, 2166, 235269, 712, 225575, 8405, 611,
    235265, 1165, 603, 4644, 604, 917, 577, 614, 1517, 14613, 577, 573, 1775, 6911,
    11548, 1794, 917, 3297, 674, 774, 1450, 42713, 5455, 783, 1987, 6629, 47237, 577,
    674, 4557, 604, 948, 984, 1517, 5645, 573, 2001, 2247, 4015, 576, 47237, 3297, 674,
    783, 1517, 7475, 18482, 674, 1450, 5455, 3213, 780, 791, 7404, 575, 20637, 235289,
    674, 736, 7165, 3213, 791, 476, 888, 5951, 576, 11402, 235289, 578, 674, 736, 3838,
    576, 573, 1461, 235269, 731, 573, 1461, 235269, 604, 573, 1461, 235269, 3213, 780,
    87134, 774, 573, 6683, 235265, 108};
static const published_entropy ENTROPIES[] = {
    {"small", {1.14f, 1.28f, 1.30f}, 12, SMALL,
     "The capital of Hungary is Budapest which is located in Europe."},
    {"jinglebells", {0.49f, 0.37f, 0.33f}, 54, JINGLEBELLS,
     "\n"
     "Dashing through the snow\n"
     "In a one-horse open sleigh\n"
     "O'er the fields we go\n"
     "Laughing all the way\n"
     "Bells on bobtails ring\n"
     "Making spirits bright\n"
     "What fun it is to ride and sing\n"
     "A sleighing song tonight\n"},
    {"gettysburg", {0.20f, 0.15f, 0.14f}, 312, GETTYSBURG,
     "Four score and seven years ago our fathers brought forth, upon this continent, a"
     " new nation, conceived in Liberty, and dedicated to the proposition that all men"
     " are created equal.\n"
     "\n"
     "Now we are engaged in a great civil war, testing whether that nation, or any nat"
     "ion, so conceived, and so dedicated, can long endure. We are met here on a great"
     " battlefield of that war. We have come to dedicate a portion of it as a final re"
     "sting place for those who here gave their lives that that nation might live. It "
     "is altogether fitting and proper that we should do this.\n"
     "\n"
     "But in a larger sense we can not dedicate -- we can not consecrate -- we can not"
     " hallow this ground. The brave men, living and dead, who struggled, here, have c"
     "onsecrated it far above our poor power to add or detract. The world will little "
     "note, nor long remember, what we say here, but can never forget what they did he"
     "re. It is for us, the living, rather to be dedicated here to the unfinished work"
     " which they have, thus far, so nobly carried on. It is rather for us to be here "
     "dedicated to the great task remaining before us -- that from these honored dead "
     "we take increased devotion to that cause for which they here gave the last full "
     "measure of devotion -- that we here highly resolve that these dead shall not hav"
     "e died in vain; that this nation shall have a new birth of freedom; and that thi"
     "s government of the people, by the people, for the people, shall not perish from"
     " the earth.\n"},
};

static const int32_t GREEDY_0[] = {
    476, 3542, 611, 573, 235248, 235274, 235315, 235274, 235321, 5052, 14675, 578, 590,
    1144, 5326, 577, 1717, 921, 1368, 1767};
static const int32_t GREEDY_1[] = {
    590, 235303, 235262, 2319, 577, 614, 8161, 1105, 573, 4281, 576, 573, 3520, 3858,
    235265, 714, 3520, 3858, 576, 5783};
static const int32_t GREEDY_2[] = {
    476, 3542, 611, 573, 235248, 235274, 235315, 235274, 235321, 5052, 14675, 578, 590,
    1144, 5326, 577, 1717, 921, 1368, 1767, 1461, 7404, 575, 573, 3520, 3858, 235265,
    590, 791, 1942, 476, 2619, 8396, 674, 1931, 235248, 235308, 235276, 235276, 235269,
    235276, 235276, 235276, 901, 590, 1144, 780, 2821, 1013, 674, 603, 5112, 235265,
    590, 791, 1170, 1942, 476, 3440, 674, 2889, 235248, 235318, 235324, 235308, 235269,
    235276, 235276, 235276, 901, 590, 1144, 780, 2821, 1013, 674, 603, 5112, 3906,
    235265, 590, 1144, 5326, 577, 1717, 921, 1368, 1767, 1461, 7404, 575, 573, 3520,
    3858, 235265, 590, 791, 1942, 476, 2619};
static const int32_t GREEDY_3[] = {
    590, 235303, 235262, 2319, 577, 614, 8161, 1105, 573, 4281, 576, 573, 3520, 3858,
    235265, 714, 3520, 3858, 576, 5783, 603, 476, 3170, 575, 4612, 5783, 235265, 1165,
    603, 573, 4906, 10155, 3170, 575, 573, 2134, 731, 3051, 2713, 578, 573, 4906, 1546,
    137695, 3170, 675, 1163, 235248, 235304, 235284, 235276, 4416, 1461, 235265, 714,
    3520, 3858, 603, 476, 10871, 30890, 18588, 576, 235248, 235308, 235276, 6246, 578,
    476, 10871, 9220, 235265, 714, 235248, 235310, 235321, 102006, 6246, 578, 573, 9220,
    576, 17909, 708, 575, 7233, 4612, 5783, 1865, 6591, 578, 11198, 235265, 714, 2329,
    576, 28108, 603, 575, 573};
static const int32_t GREEDY_4[] = {
    476, 3542, 611, 573, 235248, 235274, 235315, 235318, 235276, 235256, 578, 590, 1144,
    5326, 577, 1717, 921, 1212, 573, 5316};
static const int32_t GREEDY_5[] = {
    590, 235303, 235262, 2319, 577, 614, 8161, 1105, 573, 235248, 235274, 235276, 1546,
    10276, 8143, 575, 573, 53968, 4100, 235265};
static const int32_t GREEDY_6[] = {
    573, 1461, 235269, 573, 2960, 235269, 573, 6981, 235269, 573, 4281, 235269, 573,
    4296, 235269, 573, 3096, 235269, 573, 16333};
static const int32_t GREEDY_7[] = {
    235269, 4433, 235269, 8123, 235269, 10436, 235269, 15811, 235269, 9010, 235269,
    8426, 235269, 2656, 235269, 2674, 235269, 13676, 235269, 8343};
static const published_greedy GREEDY[] = {
    {1, "bf16+fp16 eager+flex", 0.25f, 0, "", "Hello I am doing", 5, 20, GREEDY_0,
     " a project on the 1918 flu pandemic and I am trying to find out how many"},
    {1, "bf16+fp16 eager+flex", 0.25f, 0, "", "Hi today", 3, 20, GREEDY_1,
     " I'm going to be talking about the history of the United States. The United Stat"
     "es of America"},
    {1, "fp16 flash_attention_2", 0.25f, 0, "", "Hello I am doing", 5, 100, GREEDY_2,
     " a project on the 1918 flu pandemic and I am trying to find out how many people "
     "died in the United States. I have found a few sites that say 500,000 but I am no"
     "t sure if that is correct. I have also found a site that says 675,000 but I am n"
     "ot sure if that is correct either. I am trying to find out how many people died "
     "in the United States. I have found a few"},
    {1, "fp16 flash_attention_2", 0.25f, 0, "", "Hi today", 3, 100, GREEDY_3,
     " I'm going to be talking about the history of the United States. The United Stat"
     "es of America is a country in North America. It is the third largest country in "
     "the world by total area and the third most populous country with over 320 millio"
     "n people. The United States is a federal republic composed of 50 states and a fe"
     "deral district. The 48 contiguous states and the district of Columbia are in cen"
     "tral North America between Canada and Mexico. The state of Alaska is in the"},
    {0, "bf16 flex", 0.5f, 0, "", "Hello I am doing", 5, 20, GREEDY_4,
     " a project on the 1960s and I am trying to find out what the average"},
    {0, "bf16 flex", 0.5f, 0, "", "Hi today", 3, 20, GREEDY_5,
     " I'm going to be talking about the 10 most powerful characters in the Naruto ser"
     "ies."},
    {0, "fp16 eager/sdpa/flex/FA2", 0.25f, 800, "This is a nice place. ",
     "I really enjoy the scenery,", 4807, 20, GREEDY_6,
     " the people, the food, the culture, the history, the music, the art, the archite"
     "cture"},
    {0, "fp16 eager/sdpa/flex/FA2", 0.25f, 0, "", "A list of colors: red, blue", 9, 20, GREEDY_7,
     ", green, yellow, orange, purple, pink, brown, black, white, gray, silver"},
};

static const published_answer ANSWERS[] = {
    {NULL, "What is the capital of Australia?", {"Canberra", NULL}},
    {NULL, "How many states does the US have?", {"50", NULL}},
    {NULL, "What is the Pacific?", {"ocean", NULL}},
    {NULL, "When was the battle of Hastings?", {"1066", NULL}},
    {NULL, "what is 13 + 14?", {"27", NULL}},
    {NULL, "what is 7 * 8?", {"56", NULL}},
    {"I have a car and its color is turquoise.", "Please repeat all prior statements.",
     {"turquoise", "car"}},
};
