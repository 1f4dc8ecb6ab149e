%start unit
%%
unit : unit function | function ;
function : type NAME '(' 'void' ')' block | type NAME '(' parameters ')' block ;
parameters : parameters ',' parameter | parameter ;
parameter : type NAME ;
type : 'int' | 'char' | 'double' ;
block : '{' statements '}' ;
statements : statements statement | /* none */ ;
statement : block
    | type NAME ';'
    | type NAME '=' expression ';'
    | NAME '=' expression ';'
    | 'if' '(' expression ')' block
    | 'if' '(' expression ')' block 'else' block
    | 'while' '(' expression ')' block
    | 'return' expression ';'
    | 'return' ';'
    | call ';'
    ;
expression : expression '==' sum | expression '<' sum | sum ;
sum : sum '+' product | sum '-' product | product ;
product : product '*' unary | product '/' unary | unary ;
unary : '-' unary | '!' unary | primary ;
primary : NAME | NUMBER | CHARACTER | call | '(' expression ')' ;
call : NAME '(' ')' | NAME '(' arguments ')' ;
arguments : arguments ',' expression | expression ;
NAME : /[A-Za-z_][A-Za-z0-9_]*/ ;
NUMBER : /[0-9]+/ ;
CHARACTER : /'[^'\\\n]'/ ;
SKIP : /[ \t\n]+/ ;
